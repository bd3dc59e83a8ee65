"""No test reaches the network: set before anything imports a library of Hugging Face."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
