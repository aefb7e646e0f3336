"""StyleLoom: exact control of style and content in ComfyUI.

The host calls `comfy_entrypoint`; nothing heavier than this file is imported before that, and
`weights/` can be imported through this package without the host.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import entrypoint

    return await entrypoint()
