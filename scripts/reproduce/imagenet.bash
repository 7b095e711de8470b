# What the ImageNet scripts beside this file share; each sources it.
#
# DATA_PATH   folder of ImageNet with train/<class>/ and val/<class>/ (scripts/prepare_imagenet.py makes it)
# CHECKPOINT  where a script needs one: weights, a file or a URL
# Further flags of main.py can be appended to a script. Results go to logs/ of this repository, whatever folder the script
# is started in. After an interruption run the script again: it continues from there.
set -euo pipefail
DATA_PATH=$(realpath "${DATA_PATH:?set it to the ImageNet folder that holds train/ and val/}")
[[ ${CHECKPOINT:-} == "" || $CHECKPOINT == http* ]] || CHECKPOINT=$(realpath "$CHECKPOINT")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
