"""How long a test waits for what should have happened before it fails."""

import os

_FACTOR = float(os.environ.get("HGDPO_TEST_PATIENCE", "4"))


def patience(seconds: float) -> float:
    """Seconds to wait for what takes at most `seconds` where the tests have two free cores of a processor of 2024.

    By default four times as many; HGDPO_TEST_PATIENCE=20 waits twenty times, on a machine that is slower or busier.
    """
    return seconds * _FACTOR
