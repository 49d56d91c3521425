#!/usr/bin/env bash
# The embedded base model from nothing, step by step; `make tiny-base` calls it. What is there
# already is not made again, and a step that was stopped goes on where it was, so the whole may be
# run in pieces. Needs npm, and the packages of `make install`.
#
#   examples/tiny_base/make.sh            pictures, autoencoder, model; then its check
#   examples/tiny_base/make.sh check      pictures, then the check of the model that is shipped
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
recipe=examples/tiny_base
work=build/tiny_base
packages=(iconify-json-noto-1.2.9 iconify-json-twemoji-1.2.5 emojibase-data-17.0.0)

fetch() {
  [[ ! -f $work/packages/complete ]] || return 0
  mkdir -p $work/packages
  (cd $work/packages &&
    npm pack --silent @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 emojibase-data@17.0.0 &&
    sha256sum --check "$OLDPWD/$recipe/packages.sha256")
  for package in "${packages[@]}"; do
    mkdir -p "$work/packages/$package"
    tar xzf "$work/packages/$package.tgz" -C "$work/packages/$package" --strip-components=1
  done
  touch $work/packages/complete
}

draw() {
  [[ ! -f $work/shards/index.json ]] || return 0
  $python -m pip install --quiet --disable-pip-version-check -c constraints.txt resvg-py
  rm -rf $work/pictures $work/shards
  $python $recipe/make_pictures.py "${packages[@]/#/$work/packages/}" $work/pictures
  $python -m disttrain shard $work/pictures/noto $work/shards --samples-per-shard 2000
}

train() {
  if [[ ! -f $work/autoencoder/quality.json ]]; then
    $python $recipe/train_autoencoder.py $work/pictures $work/autoencoder
  fi
  if [[ ! -f $work/start/model_index.json ]]; then
    $python $recipe/start_model.py $work/autoencoder $work/start
  fi
  $python -m disttrain train configs/tiny_base.yaml
  $python $recipe/keep_model.py $work/runs/tiny-base/subjects/icons/model $work/model
}

case ${1:-all} in
  all)
    fetch
    draw
    train
    $python $recipe/check.py $work/pictures/noto --model $work/model
    ;;
  check)
    fetch
    draw
    $python $recipe/check.py $work/pictures/noto
    ;;
  *)
    echo "$1: neither all nor check" >&2
    exit 2
    ;;
esac
