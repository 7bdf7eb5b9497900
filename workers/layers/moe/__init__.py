"""Mixtures of experts: which experts a token goes to, and what they compute.

```
routing.py         logits of the router -> ids and weights of each token's experts
token_groups.py    pairs of token and expert, in the order of the experts
grouped_weight.py  the experts' matrices, whatever they are stored as
grouped_method.py  how a projection keeps them: parameters for a loader, and what is multiplied with
mxfp4.py           weights that stay in MXFP4
grouped_linear.py  one product for all experts, by the fastest way that the device has
chosen_experts_sum.py   the second product and that sum as one, of a single token
ways.py            which way a device computes a grouped product by, as data
experts.py         the module: two grouped products and the sum over a token's experts
block.py           router, experts and shared experts together
mlp.py             the block in a decoder layer, of one rank and of several
```
"""
