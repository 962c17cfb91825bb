"""Phantoms: chest radiographs rendered from labels, and what is said of them.

- `anatomy`, `lateral`, `vessels`: a normal chest as layers, from the front and from the side.
- `traits`: what is where in a study, and how large. `frontal_findings`, `lateral_findings`: a function a finding.
- `findings`: which function draws which finding in which view; `render` of preset `five`. `views`: of preset `full`.
- `lexicon`, `lexicon_full`, `wording`: the report. `sampler`, `prevalence`, `full`: which studies there are.
"""
