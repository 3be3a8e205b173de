"""The rules `gdn_mup` for any nn.Module.

`scaling.Scaling` is the door. Behind it, in the order of what happens: `survey` builds a model without values and notes
shapes, `fans` and `init_law`; `compare` tells from two of them how every parameter grows, `parts` of fused ones too;
`initialization`, `groups`, `forward` and `table` say or apply what follows from the tables in `gdn_mup.scaling`.
"""
