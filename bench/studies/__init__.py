"""What is true of the method, one module per question, on the shipped reader.

``python -m bench.studies`` runs all in turn, ``python -m bench.studies.NAME`` one. Rows go to
``bench/results/studies-NAME.csv``, pictures beside them; ``bench/QUALITY.md`` says what they mean.
"""
