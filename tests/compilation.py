"""How tests compile: as quickly as XLA can."""

# Without LLVM's optimisation compiling takes a quarter of the time, and of what is left
# XLA's older emitter of loops, which skips MLIR, takes half.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# For programs of which one holds the other: the older emitter rounds what stands in
# both by what is fused around it, the newer one does not.
SAME_BITS = {"xla_cpu_use_fusion_emitters": True}
