"""Converters: what lies on a researcher's disk becomes a manifest.

`conversion.Conversion` is what all of them write through: kept, refused, interrupted and taken up again. `checking` and
`rows` are what they check alike, `rendering` draws radiographs that are not there, `labelled` settles studies that have
labels. `iu_xray/`, `mimic_cxr/`, `chexpert`, `nih`, `padchest`, `own_studies` (with `tabular`) and `phantoms` are the
collections; `cli/prepare/` has the command of each.
"""
