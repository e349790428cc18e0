"""What a large document costs through `longctx serve`, in processes of its own, over HTTP."""
