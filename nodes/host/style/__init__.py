"""Style Block Injector and Content Subtract inside the host: vision outputs, masks, attention."""
