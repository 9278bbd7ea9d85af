"""A thin library behind the Gato workbook.

Modules import in one direction only (`tests/test_packaging.py` holds the order); nothing here
imports a notebook or papermill, and only `plotting` imports matplotlib.
"""
