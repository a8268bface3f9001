# ---
# jupytext:
#   text_representation:
#     extension: .py
#     format_name: percent
# kernelspec:
#   name: python3
#   display_name: Python 3
# ---

# %% [markdown]
# # Tutorial
#
# Which pixels does a prediction come from? This takes a few minutes: two photographs, one network, and the questions
# that come up first. It is a script, [examples/tutorial.py](../examples/tutorial.py): run it with Python, or cell by
# cell in an editor that knows `# %%`.

# %% tags=["remove-cell"]
# ruff: noqa: B018, E402  # cells show what their last line is, and import what they need
import logging

logging.getLogger("fastdtd").setLevel("ERROR")  # not to announce that kernels are compiled

# %% [markdown]
# ## A network and two photographs
#
# SqueezeNet 1.1 and two photographs are bundled, so nothing has to be downloaded. A model knows its layers, how a
# picture becomes its input, and the names of its classes.

# %%
import fastdtd
from fastdtd.model_file import MODELS

model = fastdtd.load("squeezenet1_1")
print(model)

# %% [markdown]
# ## Explain
#
# An `Explainer` packs the weights for the kernels, so make it once and call it often. It takes paths, PIL images or
# uint8 arrays (H, W, 3), one or a list. In a notebook an explanation draws itself; `print` has the same facts as text.

# %%
explainer = fastdtd.Explainer(model)
e = explainer([MODELS / "chelsea.png", MODELS / "coffee.png"])
print(e)

# %%
e

# %% [markdown]
# Each picture's score (of the class that won) was redistributed, layer by layer, from the output down to the pixels.
# What the pixels got is the *relevance*. It is nowhere negative, and its sum is the score:

# %%
print(e.class_name(0), e.explained[0], e.sum[0], e.relevance.min())

# %% [markdown]
# ## Look at it
#
# A heatmap has the relevance of each pixel, white for none to red. An overlay has the same over the picture in grey.
# Both are PIL images, so `.save("cat.png")` keeps them.

# %%
e.overlay(0)

# %%
e.heatmap(1)

# %% [markdown]
# ## Another class
#
# Not only the winner can be explained. What in the photograph of the coffee says "cup"? A target is a class name or the
# number of an output. A name that does not exist is answered with the nearest.

# %%
cup = explainer(MODELS / "coffee.png", target="cup")
print(cup)
cup.overlay()

# %%
try:
    explainer(MODELS / "coffee.png", target="expresso machine")
except fastdtd.InputError as error:
    print(error)

# %% [markdown]
# ## Other rules
#
# How a layer redistributes relevance is its *rule*. By default (`rules="dtd"`, the method as published) it follows from
# what the layer reads: z+ in hidden layers, z^B in the first, whose input has known bounds. Other packages' rules have
# names, and any layer's rule can be changed, by its name, a pattern or a type:

# %%
changed = {"type:max_pool2d": "proportional", "conv1": fastdtd.Rule("z+", epsilon=0.25)}
for rules in ("dtd", "zennit.epsilon_plus", ["dtd", changed]):
    print(rules)
    print(fastdtd.Explainer(model, rules)(MODELS / "coffee.png"))

# %% [markdown]
# ## The ledger
#
# Above, relevance is not always the score: part of it was *absorbed*. The sums of zennit's rules include the bias,
# which is no input and can pass nothing on; an epsilon keeps a part, too. By the default rules a layer absorbs only
# where a neuron is active though none of its inputs contributes. Nothing is lost in silence; the *ledger* has it, by
# layer.

# %%
plus = fastdtd.Explainer(model, "zennit.epsilon_plus")(MODELS / "coffee.png")
most = sorted(plus.ledger, key=lambda name: -plus.ledger[name][0])[:3]
print({name: round(float(plus.ledger[name][0]), 3) for name in most})
print("relevance", plus.sum[0], "+ absorbed", plus.absorbed[0], "= score", plus.explained[0])

# %% [markdown]
# ## Inside the network
#
# `e.at(layer)` has the relevance of everything that a layer makes: here of the 256 channels after the fourth block, of
# which a few carry most. `fastdtd show squeezenet1_1` lists the layers' names.

# %%
channels = e.at("fire5/concat")[0].sum((1, 2))
strongest = channels.argsort()[::-1][:5]
print(channels.shape, {int(channel): round(float(channels[channel]), 2) for channel in strongest}, channels.sum())

# %% [markdown]
# ## Keep it
#
# One HDF5 file has relevance, scores, targets, sums and the ledger, for any program that reads HDF5.

# %%
import tempfile
from pathlib import Path

import h5py

with tempfile.TemporaryDirectory() as folder:
    e.save(Path(folder) / "out.h5")
    with h5py.File(Path(folder) / "out.h5") as file:
        print({name: file[name].shape for name in ("relevance", "scores", "target", "sum")})

# %% [markdown]
# ## From here
#
# - [Explain many pictures](howto-many-pictures.md) from the command line, within bounds of memory.
# - [Your own network](howto-own-network.md), from ONNX, Keras, Caffe or PyTorch.
# - [The method](method.md), and the [presets](presets.md) of other packages.
# - The [API](api/index.md).
