"""Small real parts and conformance suites, for the tests of this package and of third parties.

stores.py     what every ObjectStore must do
parts.py      table entries of a tiny autoencoder and a tiny teacher (networks.py holds their code)
"""
