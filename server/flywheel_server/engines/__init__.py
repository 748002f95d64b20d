"""The engines, which turn a prompt into text. All of them implement the protocol of `base`.

`llama_cpp` runs a model in this process, `modal` calls a class on Modal, and `scripted` plays a script. The other modules of
this folder are what several engines share: `samples` for text and stop sequences, `capacity` for the queue of an engine,
`seeds` for the seeds of samples, `stepping` for a step of all generations at once, and `uninterrupted` for work that a cancel
cannot interrupt.
"""
