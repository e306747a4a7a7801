"""Stands in for a flavoured package of the vendor's, which has the converter alone."""
