#!/bin/sh
# Build the wheel, install it where no checkout is, and use it from there. Argument: a Python that has the build's needs.
set -eu
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
ls "$work"/ditscale-*-py3-none-*.whl
# The second environment sees the first one's libraries, torch among them, but not the checkout.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps "$work"/ditscale-*.whl
here=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Paths only: the editable install's own hook is a .pth file, and those are not read from a path added this way.
echo "$site" >"$here/neighbours.pth"
cd "$work"
PATH="$work/venv/bin:$PATH"
export PATH
python -c 'import ditscale, pathlib, sys; assert pathlib.Path(ditscale.__file__).is_relative_to(sys.prefix), ditscale.__file__'
python -c 'import ditscale, sys; assert not {"torch", "triton"} & set(sys.modules)'
ditscale doctor --json >doctor.json
test "$(ditscale flops DiT-XL/2 --json | python -c 'import json, sys; print(json.load(sys.stdin)["train_flops"])')" = 711718502400
ditscale demo --quick --out demo >demo.txt 2>&1 || { cat demo.txt; exit 1; }
test -s demo/report.html
! ditscale flops DiT-XXXL/3 2>error.txt
test "$(wc -l <error.txt)" = 1
echo "the installed wheel works"
