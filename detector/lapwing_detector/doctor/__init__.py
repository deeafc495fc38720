"""Checks a model before anyone relies on what is captured of it: `lapwing doctor`.

`examination.examine` makes the checks of a `patient`, each of which comes to a `verdict`; `report` shows them.
"""
