#!/bin/sh
# The dense run, and what is made of it; from the repository's root.
set -e
place=sweeps/upcycling_sources
options="--config.model.moe.d_expert=256
  --config.model.moe.router=top_k(k=2,renormalize=True)"
moejax train --config=configs/tiny.py --workdir=$place/dense \
  --config.model.pattern=attention/mlp --config.model.d_mlp=256 \
  --config.train.num_steps=200 --config.seed=7
moejax convert upcycle $place/dense --config=configs/tiny.py $options \
  --output=$place/upcycled
moejax convert upcycle $place/dense --config=configs/tiny.py $options \
  --output=$place/noise --noise=0.5 --noise-std=0.02
