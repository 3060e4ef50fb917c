# SPDX-License-Identifier: Apache-2.0
"""The letters that end array names: one legend for the whole code.

`x_BTD` is an array of shape [batch, tokens, model width]; weights follow the
same rule (`w_gate_EDF`), and einsum letters match the suffixes.

  B  batch rows                 E  experts
  T  tokens of a row, queries   X  experts per token
  S  keys                       A  assignments (token, expert), at most T*X
  D  model width                C  capacity of one expert, of one device
  N  query heads                F  hidden width of an expert or MLP
  K  key/value heads            V  vocabulary
  H  size of one head           L  layers
  G  query heads per KV, groups R  repeats of the layer pattern
  Z  width of a latent vector   P  devices of a mesh axis
  W  last steps that count      U  sources of the data

Where a layer flattens its rows, `T` counts all of the batch's tokens.
"""

LEGEND = "BTSDNKHGEXACFVLRZPWU"
