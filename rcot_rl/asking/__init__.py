"""Descriptions and traces of whole corpora, by a model (`rcot data describe`, `rcot data trace`).

`describe.py` and `trace.py` say what is asked and what becomes of the answers, `session.py` asks;
`launch.py` runs either in a process of its own.
"""
