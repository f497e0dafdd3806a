# The data sets of these experiments, from the files of MNIST and Fashion-MNIST to HDF5 here. Usage: sh data.sh FOLDER
#
# FOLDER/mnist and FOLDER/fashion-mnist hold the four .gz files of each.
set -eu
mpiclip data import "$1"/mnist/train-*.gz mnist.h5 --test "$1"/mnist/t10k-*.gz
mpiclip data import "$1"/fashion-mnist/train-*.gz fashion.h5 --test "$1"/fashion-mnist/t10k-*.gz
