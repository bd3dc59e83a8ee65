"""`python -m masformer`, which torchrun takes too."""

from .cli import main

main()
