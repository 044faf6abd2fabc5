"""A recipe that pushes to a Hub on loopback: `connected_recipe.py ENVIRONMENT_AS_JSON RECIPE words...`."""

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    from hfkd.hub_server import connected_to

    _, environment, recipe, *sys.argv[1:] = sys.argv
    sys.argv[0] = recipe
    sys.path.insert(0, str(Path(recipe).parent))
    with connected_to(json.loads(environment)):
        runpy.run_path(recipe, run_name="__main__")
