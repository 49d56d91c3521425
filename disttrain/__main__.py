"""`python -m disttrain`: what accelerate launch and torchrun start."""

import sys

from disttrain.cli import main

sys.exit(main())
