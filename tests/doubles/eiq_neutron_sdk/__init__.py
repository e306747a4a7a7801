"""Stands in for the vendor's package, which is not available where the project is built.

It has the interface that the project's documents describe; the environment variable `NEUTRON_DOUBLE` says what it does.
"""
