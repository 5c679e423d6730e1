"""How bnfast.fuse works: what a block's forward does is traced, and where a layer's call is followed by an
activation, the block's class is replaced by a subclass of itself whose forward makes one call of it."""
