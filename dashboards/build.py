"""`python -m dashboards.build`: writes json/ anew."""

from __future__ import annotations

from pathlib import Path

from dashboards import breakers, errors, overview, queues, telemetry

FOLDER = Path(__file__).parent / "json"
BOARDS = (overview.BOARD, errors.BOARD, breakers.BOARD, queues.BOARD, telemetry.BOARD)


def rendered() -> dict[str, str]:
    """{file name: its text} of every board."""
    return {f"{board.uid.removeprefix('glassbus-')}.json": board.to_json() for board in BOARDS}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
