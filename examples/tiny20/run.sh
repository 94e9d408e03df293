#!/bin/sh
# REPA and its vanilla twin on tiny20, from images to one page. Every line may be killed and rerun.
#
#     REPA_SHARED=/path/to/shared ./run.sh
set -eu
cd "$(dirname "$0")"
data=${REPA_SHARED:?set it to the folder that holds data/tiny20 and data/weights}/data
train='train-{0000..0009}.tar.gz'

export REPA_SOURCE="${REPA_SOURCE:-$data/tiny20/$train}"
export REPA_ENCODE_LATENTS_WEIGHTS="$data/weights/taesd_bf16.safetensors"
export REPA_CACHE_FEATURES_WEIGHTS="$data/weights/mobilenet_v2_1.0_int8.safetensors"
export REPA_DECODER_WEIGHTS="$data/weights/taesd_bf16.safetensors"
export REPA_NETWORK_WEIGHTS="$data/weights/mobilenet_v1_1.0_uint8.safetensors"

repa encode-latents
repa cache-features
repa train aligned
repa train vanilla --encoder none
repa sample --run aligned
repa sample --run vanilla
repa evaluate --run aligned
repa evaluate --run vanilla
repa report
