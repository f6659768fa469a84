"""Draw a saved moment of a run as the README's picture: python docs/make_picture.py STATE.npz [docs/live-view.svg]

The state is what `relod.runtime.viewstate.save_state` wrote.
"""

import io
import sys
from pathlib import Path

from rich.console import Console

from relod.runtime.view import render
from relod.runtime.viewstate import load_state

WIDTH, HEIGHT = 112, 29


def main(arguments: list[str]) -> int:
    """Write the picture; returns the exit code."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).with_name("live-view.svg")
    state = load_state(Path(arguments[0]))
    console = Console(
        record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(render(state, WIDTH, HEIGHT))
    console.save_svg(str(target), title=f"relod run {state.task}")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
