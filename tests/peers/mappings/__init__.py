"""From the weights and configs of public implementations to those of our layers, a file a family.

Pure functions: `<peer>_options(config)` gives the keyword arguments of our layer, and
`<peer>_weights(state, config)` its state dict from the peer's. Every weight is used, and none is
copied to two places, so that gradients go through a mapping as well as values.
"""
