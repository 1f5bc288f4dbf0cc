package api

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/netip"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write docs/openapi.yaml")

const description = "../../docs/openapi.yaml"

// TestDescriptionIsThatOfTheTypes makes docs/openapi.yaml of Operations, the types and their comments.
func TestDescriptionIsThatOfTheTypes(t *testing.T) {
	d := &describer{docs: comments(t, ".", "../flows", "../verify", "../../xfrmwatch"), schemas: map[string]*yaml.Node{}, types: map[string]reflect.Type{}}
	var b bytes.Buffer
	b.WriteString("# The control API. It is made of package agent/api: go test ./agent/api -update writes it.\n")
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(d.document()); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(description, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(description)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(have), b.String()); diff != "" {
		t.Errorf("%s is not what the types are, -update writes it (-have +want)\n%s", description, diff)
	}
	for _, name := range d.silent {
		t.Errorf("%s has no comment", name)
	}
}

// TestDescriptionIsOpenAPI has another program read it.
func TestDescriptionIsOpenAPI(t *testing.T) {
	doc, err := openapi3.NewLoader().LoadFromFile(description)
	if err == nil {
		err = doc.Validate(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, item := range doc.Paths.Map() {
		n += len(item.Operations())
	}
	if n != len(Operations) {
		t.Errorf("%d operations are described, there are %d", n, len(Operations))
	}
}

func TestOperationsAreOfOneKindEach(t *testing.T) {
	names := map[string]bool{}
	for _, op := range Operations {
		if names[op.Name] || op.Name == "" {
			t.Errorf("the name %q is not unique", op.Name)
		}
		names[op.Name] = true
		if (op.Body != nil) != op.ForRoot() || op.Answer == nil && op.Line == nil {
			t.Errorf("%s: body %v, answer %v, line %v", op.Name, op.Body, op.Answer, op.Line)
		}
	}
}

// comments are those of all types and fields of packages, as PACKAGE.TYPE and PACKAGE.TYPE.FIELD.
func comments(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), dir+"/"+e.Name(), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			for _, decl := range f.Decls {
				gen, ok := decl.(*ast.GenDecl)
				if !ok || gen.Tok != token.TYPE {
					continue
				}
				for _, spec := range gen.Specs {
					typ := spec.(*ast.TypeSpec)
					called := f.Name.Name + "." + typ.Name.Name
					out[called] = sentence(gen.Doc.Text())
					fields, ok := typ.Type.(*ast.StructType)
					if !ok {
						continue
					}
					for _, field := range fields.Fields.List {
						for _, name := range field.Names {
							text := sentence(field.Doc.Text())
							if line := sentence(field.Comment.Text()); line != "" {
								text = strings.TrimSpace(text + " " + line)
							}
							out[called+"."+name.Name] = text
						}
					}
				}
			}
		}
	}
	return out
}

// sentence is a comment on one line.
func sentence(s string) string { return strings.Join(strings.Fields(s), " ") }

// describer makes the description.
type describer struct {
	docs    map[string]string
	schemas map[string]*yaml.Node
	types   map[string]reflect.Type // by their names in schemas
	silent  []string
}

func text(s string) *yaml.Node {
	n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
	if s == "true" || s == "3.0.3" || s == fmt.Sprint(Version) {
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

func yes() *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: "true"} }

func list(items ...*yaml.Node) *yaml.Node { return &yaml.Node{Kind: yaml.SequenceNode, Content: items} }

// object has keys and values in turn; values are strings or nodes, and nil ones are left out.
func object(pairs ...any) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for i := 0; i < len(pairs); i += 2 {
		var value *yaml.Node
		switch v := pairs[i+1].(type) {
		case string:
			value = text(v)
		case *yaml.Node:
			value = v
		}
		if value != nil {
			key := text(pairs[i].(string))
			if strings.Trim(key.Value, "0123456789") == "" {
				key.Style = yaml.DoubleQuotedStyle
			}
			n.Content = append(n.Content, key, value)
		}
	}
	return n
}

func (d *describer) document() *yaml.Node {
	paths := object()
	for i := range Operations {
		op := &Operations[i]
		paths.Content = append(paths.Content, text(op.Path), object(strings.ToLower(op.Method), d.operation(op)))
	}
	schemas := object()
	for _, name := range sorted(d.schemas) {
		schemas.Content = append(schemas.Content, text(name), d.schemas[name])
	}
	return object(
		"openapi", "3.0.3",
		"info", object("title", "tsoagent control API", "version", fmt.Sprint(Version),
			"description", "HTTP on the unix socket /run/tsoagent/tsoagent.sock. Who may open the socket may ask what is a GET; the rest is for root, "+
				"as the kernel knows the other end of the socket (SO_PEERCRED). Within a version fields may be added; clients ignore those that they don't know."),
		"servers", list(object("url", "http://tsoagent", "description", "any host name: the socket decides")),
		"paths", paths,
		"components", object("schemas", schemas),
	)
}

func sorted(m map[string]*yaml.Node) []string {
	var out []string
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func (d *describer) operation(op *Operation) *yaml.Node {
	params := list()
	for _, p := range op.Query {
		var required *yaml.Node
		if p.Required {
			required = yes()
		}
		params.Content = append(params.Content, object("name", p.Name, "in", "query", "required", required, "description", p.Text, "schema", object("type", p.Type)))
	}
	if len(params.Content) == 0 {
		params = nil
	}
	var body *yaml.Node
	if op.Body != nil {
		body = object("required", yes(), "content", object("application/json", object("schema", d.schema(reflect.TypeOf(op.Body)))))
	}
	content := object()
	if op.Answer != nil {
		content.Content = append(content.Content, text("application/json"), object("schema", d.schema(reflect.TypeOf(op.Answer))))
	}
	if op.Line != nil {
		content.Content = append(content.Content, text(NDJSON), object("schema", d.schema(reflect.TypeOf(op.Line))))
	}
	about := "the answer"
	if op.Line != nil {
		about = "the answer; of " + NDJSON + " the schema is that of each line"
	}
	responses := object("200", object("description", about, "content", content))
	codes := append(slices.Clone(op.Errors), http.StatusMethodNotAllowed)
	slices.Sort(codes)
	for _, code := range codes {
		responses.Content = append(responses.Content, object(fmt.Sprint(code),
			object("description", strings.ToLower(http.StatusText(code)), "content", object("application/json", object("schema", d.schema(reflect.TypeFor[Error]()))))).Content...)
	}
	return object("operationId", op.Name, "summary", op.Summary, "parameters", params, "requestBody", body, "responses", responses)
}

// schema is that of a type; structs are named.
func (d *describer) schema(t reflect.Type) *yaml.Node {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object("type", "string", "format", "date-time")
	case t == reflect.TypeFor[netip.Addr](), t == reflect.TypeFor[netip.Prefix]():
		return object("type", "string")
	case t == reflect.TypeFor[Mode]():
		return object("type", "string", "enum", list(text(string(Enforce)), text(string(Observe))))
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.schema(t.Elem())
	case reflect.Slice:
		return object("type", "array", "items", d.schema(t.Elem()))
	case reflect.Map:
		return object("type", "object", "additionalProperties", d.schema(t.Elem()))
	case reflect.String:
		return object("type", "string")
	case reflect.Bool:
		return object("type", "boolean")
	case reflect.Float64:
		return object("type", "number")
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return object("type", "integer", "minimum", &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: "0"})
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return object("type", "integer")
	case reflect.Struct:
		d.structure(t)
		return object("$ref", "#/components/schemas/"+t.Name())
	}
	panic("no schema for " + t.String())
}

// comment is that of a type, or of a field of one.
func (d *describer) comment(t reflect.Type, field string) string {
	return d.docs[strings.Join(slices.DeleteFunc([]string{path.Base(t.PkgPath()), t.Name(), field}, func(s string) bool { return s == "" }), ".")]
}

func (d *describer) structure(t reflect.Type) {
	if have := d.types[t.Name()]; have != nil && have != t {
		panic(fmt.Sprintf("%v and %v have the same name", have, t))
	}
	if d.schemas[t.Name()] != nil {
		return
	}
	d.types[t.Name()] = t
	about := d.comment(t, "")
	if about == "" {
		d.silent = append(d.silent, t.Name())
	}
	n := object()
	d.schemas[t.Name()] = n // ahead of its fields: it may have itself in them
	props, required := object(), list()
	d.fields(t, true, props, required)
	if len(required.Content) == 0 {
		required = nil
	}
	if len(props.Content) == 0 {
		props = nil
	}
	*n = *object("type", "object", "description", about, "required", required, "properties", props)
}

func (d *describer) fields(t reflect.Type, always bool, props, required *yaml.Node) {
	for f := range t.Fields() {
		if f.Anonymous {
			of, is := f.Type, always
			if of.Kind() == reflect.Pointer {
				of, is = of.Elem(), false
			}
			d.fields(of, is, props, required)
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		s := d.schema(f.Type)
		if about := d.comment(t, f.Name); about != "" {
			if s.Content[0].Value == "$ref" { // beside which there can't be anything
				s = object("allOf", list(s), "description", about)
			} else {
				s.Content = append(s.Content, text("description"), text(about))
			}
		}
		props.Content = append(props.Content, text(name), s)
		if always && !strings.Contains(options, "omit") {
			required.Content = append(required.Content, text(name))
		}
	}
}
