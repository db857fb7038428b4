"""Triton kernels, one operator per file family: launchers `forward` and `backward`, device code beside them.

Imports torch and triton only, never the rest of lorasp: the package stands alone under the operator's raw schema.
"""
