"""The methods: a registry, and one file per family. Nothing here knows of graphs.

To add a method, write its module in the family's file and register it in `registry.py`.
"""
