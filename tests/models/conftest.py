"""One thread: the models here are tiny, and the test runner spreads the tests over the cores."""

import torch

torch.set_num_threads(1)
