"""What a report says: the 14 observations, CheXbert, and training a labeler.

Who knows whom, from below:
- `observations`: the 14 names and classes, the signed vector, label files. `reports`: report files.
- `sentences`: where a sentence ends.
- `chexbert`: the architecture. `tokenizer`: texts to ids. `loading`: weights from files.
- `inference`: the fast forward pass. `labeler`: texts in, classes out; all that the rest of the project needs.
- `starting`, `augmentation`, `teaching`, `fitting`, `training`: a labeler of one's own. `convert`: another file format.
"""
