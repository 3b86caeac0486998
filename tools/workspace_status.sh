#!/bin/sh
# Read by builds with --stamp only (see packaging/): the commit that a release was built from.
commit=$(git describe --always --abbrev=12 --match '' --dirty 2>/dev/null) || commit=unknown
echo "STABLE_COMMIT $commit"
