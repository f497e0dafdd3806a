"""The breast-cancer data that scikit-learn carries, standardised, as an npz file for `mpiclip data import`."""

import sys

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

X, y = load_breast_cancer(return_X_y=True)
np.savez(sys.argv[1], X=StandardScaler().fit_transform(X), y=y)
