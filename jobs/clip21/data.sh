# The data sets of these experiments, from LIBSVM text and MNIST's IDX files to HDF5 here. Usage: sh data.sh FOLDER
#
# FOLDER/libsvm holds a9a a9a.t w8a mushrooms phishing splice splice.t australian_scale abalone_scale housing_scale of
# https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/, FOLDER/mnist the four .gz files of MNIST.
set -eu
mpiclip data import "$1/libsvm/a9a" a9a.h5 --test "$1/libsvm/a9a.t" --features 123
mpiclip data import "$1/libsvm/w8a" w8a.h5 --features 300
mpiclip data import "$1/libsvm/splice" splice.h5 --test "$1/libsvm/splice.t"
for set in mushrooms phishing; do mpiclip data import "$1/libsvm/$set" "$set.h5"; done
for set in australian abalone housing; do mpiclip data import "$1/libsvm/${set}_scale" "$set.h5"; done
mpiclip data import "$1"/mnist/train-*.gz mnist.h5 --test "$1"/mnist/t10k-*.gz
