"""How an explanation is shown: in the terminal, as an HTML page, as a figure.

These modules read an ``Explanation`` and import nothing of ``explanation.py`` at run time.
"""
