"""LoRAs on some rows of a batch only: the layer is computed once, and each row gets the change of its own adapters.

Guidance (one LoRA state on the positive rows, another on the negative ones) and the merge (content, style and masked
rows) both stand on it. A *branch* is a set of rows with the same adapters; `rows.py` says which rows those are,
`terms.py`, `low_rank.py` and `masked.py` what an adapter adds to a layer's output, and `forward.py` puts both into the
layers of a model.

What is close to it, and why it is not used:

* LyCORIS' bypass mode (`bypass_forward` of its modules) and the host's form of it (`comfy.weight_adapter.bypass`, node
  LoraLoaderBypass) compute g(f(x) + h(x)) without touching the weight, as here, but for the whole batch. The host's
  leaves out patches of a part of a weight (fused q, k, v) and of a weight whose rows are stored in another order.
* PEFT's batch with mixed adapters (`adapter_names` of `LoraLayer`) names an adapter for each row. It needs PEFT's own
  layers in place of the model's, gathers the rows by index (a copy of input and output for each adapter), and has no
  LoHa, LoKr, OFT or norms there.

Here a run of rows is a view, the change is added to it in place, and any layer that has a `forward` will do.
"""
