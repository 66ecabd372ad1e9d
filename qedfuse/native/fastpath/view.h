/* NativeView, seen from C: all that Python is asked and told of an image. Every function needs the GIL. */
#ifndef QEDFUSE_VIEW_H
#define QEDFUSE_VIEW_H

#include "layer.h"

/* To be called once. False: an exception. */
bool view_prepare(void);

/* Fetches what stays, and the numbers that change. False: an exception. */
bool view_fetch(Layer *layer);

/* Fetches the numbers that change: they hold until Python runs again. Python must have been told of all writes. False:
 * they are not known. */
bool view_refresh(Layer *layer);

/* Tells of the writes since it was told last. */
void view_tell(Layer *layer);

/* Offers a table page that was read, of PAGE bytes. Returns whether Python has taken it. */
bool view_take_page(const Layer *layer, bool is_l1, uint64_t number, uint64_t host, const char *page);

#endif
