package routes

// Paths are all routes of one table to one destination, in the kernel's order. Destinations
// with a single route share the Paths of its Body, so a table stores one pointer each.
type Paths struct {
	bodies []*Body
}

// NewBody prepares a Body for sharing. Decoders call it once for each distinct Body.
func NewBody(b Body) *Body {
	p := &b
	p.paths = &Paths{bodies: []*Body{p}}
	return p
}

// Bodies returns the routes in the kernel's order. The slice is not to be changed.
func (p *Paths) Bodies() []*Body {
	if p == nil {
		return nil
	}
	return p.bodies
}

func pathsOf(bodies []*Body) *Paths {
	switch len(bodies) {
	case 0:
		return nil
	case 1:
		if p := bodies[0].paths; p != nil && p.bodies[0] == bodies[0] { // not of a copy
			return bodies[0].paths
		}
	}
	return &Paths{bodies: bodies}
}
