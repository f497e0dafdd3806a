"""The synthetic data of the EPISODE paper (arXiv:2302.07155): two workers with the polynomials
f_i(x) = x⁴ − 3x³ − H h_i x² + x, h = (−1, 2), and gradients whose noise is uniform in [−1, 1].

Writes polynomial_H.h5 for H = 1, 2, 4, 8: rows are coefficients (problem.name = "polynomial"), the label is the worker.
"""

import numpy as np

from mpiclip.importers import import_file

noise = np.linspace(-1, 1, 1001)
for H in (1, 2, 4, 8):
    rows = [[1 + z, -H * h, -3.0, 1.0] for h in (-1, 2) for z in noise]
    np.savez("rows.npz", X=np.array(rows), y=np.repeat([0, 1], len(noise)))
    import_file(["rows.npz"], f"polynomial_{H}.h5")
