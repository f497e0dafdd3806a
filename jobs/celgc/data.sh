# The data sets of these experiments, from texts and images to HDF5 here. Usage: sh data.sh FOLDER
#
# FOLDER/wikitext-2 holds wiki.train.tokens and wiki.valid.tokens, FOLDER/tinyshakespeare input.txt (its last tenth is
# the test text), FOLDER/fashion-mnist the four .gz files; FOLDER/cifar-10-binary.tar.gz may be missing.
set -eu
mpiclip data import "$1"/wikitext-2/wiki.train.tokens wikitext.h5 --test "$1"/wikitext-2/wiki.valid.tokens
head -n 35991 "$1"/tinyshakespeare/input.txt >train.txt
tail -n +35992 "$1"/tinyshakespeare/input.txt >test.txt
mpiclip data import train.txt shakespeare.h5 --test test.txt --level char
rm train.txt test.txt
mpiclip data import "$1"/fashion-mnist/train-*.gz fashion.h5 --test "$1"/fashion-mnist/t10k-*.gz
if [ -e "$1"/cifar-10-binary.tar.gz ]; then
    mpiclip data import "$1"/cifar-10-binary.tar.gz cifar.h5 --test "$1"/cifar-10-binary.tar.gz
fi
