"""Prints, as JSON, what ExecuTorch's own code reads from the converter's log: `python profile_oracle.py LOG COUNT`.

LOG is a file. COUNT is the number of operators of the TFLite model; each counts as an edge node.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from executorch.backends.nxp.backend.neutron_map import NeutronMap

    one_each = {number: (number,) for number in range(int(sys.argv[2]))}
    found = NeutronMap(Path(sys.argv[1]).read_text(), one_each).get_neutron_to_edge_map()
    print(json.dumps([list(found[kernel]) for kernel in sorted(found)]))


if __name__ == "__main__":
    main()
