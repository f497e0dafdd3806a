"""Compiles kernels/*.c into one shared library; without a compiler the install still works, on NumPy."""

from glob import glob

from setuptools import Extension, setup

cpu_kernels = Extension(
    "mpiclip.kernels._cpu",                     # no Python module: a plain library that device.py opens with ctypes
    sources=sorted(glob("kernels/*.c")),
    depends=glob("kernels/*.h"),
    # Not -ffast-math: it would set flush-to-zero for the whole process and lose NaN, which the runtime must see. Not
    # contracted: products and sums are rounded one by one, as NumPy rounds them.
    extra_compile_args=["-O3", "-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
                        "-Wall", "-Wextra"],
    extra_link_args=["-fopenmp"],
    libraries=["m"],
    optional=True,
)

setup(
    packages=["mpiclip", "mpiclip.kernels", "mpiclip.methods", "mpiclip.problems"],
    package_dir={"mpiclip": "mpiclip", "mpiclip.kernels": "kernels"},
    package_data={"mpiclip.kernels": ["*.c", "*.h", "*.cu", "*.cuh"]},
    ext_modules=[cpu_kernels],
)
