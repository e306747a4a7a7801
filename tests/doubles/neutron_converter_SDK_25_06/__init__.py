"""Test double of a vendor's package with a flavour, which only has the converter."""
