# The demo: clipped gradient descent beside Clip21, same data, same threshold, on 4 ranks. Usage: sh run.sh FOLDER
set -eu
jobs=$(cd "$(dirname "$0")" && pwd)
rm -rf "$1" && mkdir -p "$1" && cd "$1"

python "$jobs/data.py" breast_cancer.npz
mpiclip data import breast_cancer.npz breast_cancer.h5
for method in clip_gd clip21; do
    echo "\$ mpirun -n 4 mpiclip train $method.toml --out $method"
    mpirun -n 4 mpiclip train "$jobs/$method.toml" --out $method
done
mpiclip show clip_gd clip21
mpiclip plot clip_gd clip21 --y grad_norm -o grad_norm.png
echo "The picture: $1/grad_norm.png"
