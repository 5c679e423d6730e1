"""How bnfast.fuse works. A *block* is a module whose forward calls normalization layers. Its forward is
traced with torch.fx. Where an activation follows the call of a layer (a *site*), the block's class is
replaced by a subclass whose forward makes one call of the two. The subclass has *guards*: conditions under
which the traced forward is valid. Where one of them does not hold, the original forward runs.

survey.py finds the blocks; tracing.py, observing.py, watching.py and symbols.py record a forward and what it
depends on; guards.py and values.py hold these conditions; patterns.py finds sites in the graph;
call_site.py and blocks.py rewrite them; report.py explains the result."""
