#!/usr/bin/env bash
# Lint and the test suite, on CPU, one process per core. Further arguments go to pytest: bash launch/test.sh tests/models -x
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
ruff check .
python -m pytest --numprocesses auto --dist loadfile "$@"
