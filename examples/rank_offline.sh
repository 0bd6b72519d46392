#!/usr/bin/env bash
# Order a pool of images for labeling with a trained detector, without Label Studio.
#
#   examples/rank_offline.sh [FOLDER]
#
# Data and detector are made here, so that it runs as it stands. With your own, the last command is all you need:
# a COCO file of the images, their folder, and a checkpoint of ours or of mmdetection.
set -euo pipefail
out=${1:-rank-offline}

# A small labelled set, one to test on, and a pool.
ppal demo-data "$out/labelled" --images 40 --seed 1
ppal demo-data "$out/test" --images 20 --seed 2
ppal demo-data "$out/pool" --images 60 --seed 3

# A detector trained for a moment on some of the labelled images.
ppal simulate --data "$out/labelled/annotations.json" --test "$out/test/annotations.json" --strategies random \
    --start 20 --budget 10 --rounds 1 --seeds 1 --max-iterations 40 --keep --out "$out/simulation"
checkpoint=$(find "$out/simulation" -path '*random*' -name final.pth | sort | tail -n 1)

# The ten images of the pool that would teach it most: ranking.csv, and ranking.json with the reasons.
ppal rank --data "$out/pool/annotations.json" --checkpoint "$checkpoint" --budget 10 --out "$out/ranking"
head -n 11 "$out/ranking/ranking.csv" | cut -d, -f1-6
