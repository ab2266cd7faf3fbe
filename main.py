"""The one entry point.

    python main.py config=configs/quickstart.yaml            run a config
    python main.py config=PATH key=value group=option        change it
    python main.py config=PATH --cfg job                     show it without running

Everything Hydra offers works behind `config=PATH`. Called alone it lists the configs there are.
"""

import sys

from vaura.launch import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
